"""What a student begins with: new weights, a checkpoint, or parts of the teacher."""
