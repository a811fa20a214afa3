"""What the training loops are handed: checkpoints, schedule, tracking, ranks, weight EMA."""
