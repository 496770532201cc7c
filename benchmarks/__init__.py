"""Measurements of nlutils beside other implementations; README.md says how to run them."""
