"""`coldstill evaluate --tasks`: trained students in lm-eval, on task files of the user's own."""
