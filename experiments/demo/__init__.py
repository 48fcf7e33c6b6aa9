"""The demo, and the pictures and tables of the README."""
