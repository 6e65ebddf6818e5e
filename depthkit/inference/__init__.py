"""From images and videos to depth: loading models of any format, predicting, and writing the results."""
