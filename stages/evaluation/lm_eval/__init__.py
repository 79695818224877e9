"""Students in lm-eval, EleutherAI's harness: the tasks given, and nothing from elsewhere."""
