"""What a capture and a training will cost: sizes, memory, and a pilot that measures a sample."""
