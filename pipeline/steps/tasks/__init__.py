"""`coldstill evaluate --tasks`: runs lm-eval task files on trained students."""
