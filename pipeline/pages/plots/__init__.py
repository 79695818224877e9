"""Plots as SVG, drawn by Vega-Lite: `chart` describes a plot, `drawing` turns it into an SVG."""
