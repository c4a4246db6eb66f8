"""Where people look at runs: tensorboard, Weights & Biases, MLflow. A file each, and `build.py`, which opens them."""
