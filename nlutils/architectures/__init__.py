"""What the PyTorch and the Keras networks share: tables, rules and names, without any framework."""
