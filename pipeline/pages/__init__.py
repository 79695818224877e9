"""Pages and terminal views: compare, report and inspect."""
