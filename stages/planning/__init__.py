"""What a capture will cost and be worth, measured or foretold before it is paid for."""
