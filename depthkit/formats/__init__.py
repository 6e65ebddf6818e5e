"""What other tools read and write: official checkpoints, Hugging Face folders, ONNX files, model cards."""
