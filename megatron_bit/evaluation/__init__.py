"""What a trained model is worth: likelihood of held-out text, quality of its samples, zero-shot tasks."""
