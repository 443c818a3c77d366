"""What a run leaves: records, the picture of its losses, its model card; and several runs compared."""
