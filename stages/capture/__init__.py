"""The parts of stage one: plan, teacher, forward pass, answers, selection, writing of shards."""
