"""Recognisers: checkpoints, embeddings, ONNX and dlib, divided classes, training."""
