"""The teacher's targets on a device, the student's softmax, and the losses."""
