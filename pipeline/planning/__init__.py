"""`coldstill plan`: what a recipe will do and take, and a capture in small."""
