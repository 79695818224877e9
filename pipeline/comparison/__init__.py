"""What a comparison is besides its table: curves of training, plots, and a page that holds them."""
