"""etl: Spark jobs from search and recommendation logs to a labelled Delta samples table."""
