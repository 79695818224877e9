"""`coldstill inspect`: what a store holds, as text, as JSON, and as a page to look at."""
