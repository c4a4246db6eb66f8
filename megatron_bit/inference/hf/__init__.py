"""What a converted folder brings along to run without this project."""
