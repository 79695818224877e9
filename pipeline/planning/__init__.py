"""`coldstill plan`: what a recipe will do and cost, and a pilot that measures a sample."""
