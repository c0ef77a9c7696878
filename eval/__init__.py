"""What you run to judge a model or a method."""
