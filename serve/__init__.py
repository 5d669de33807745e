"""The model online, with Ray Serve."""
