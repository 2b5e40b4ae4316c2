"""The dashboard: views choose, call one library function, show one figure."""
