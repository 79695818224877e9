"""`coldstill inspect`: the content of a store as text, as JSON and as an HTML page."""
