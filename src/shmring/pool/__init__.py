"""Work spread over processes: coordinator, workers, the table of tasks."""
