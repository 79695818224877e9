"""The teacher's targets as tensors, the student's softmax, and the losses."""
