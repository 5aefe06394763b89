"""What all methods stand on: configurations, factors, the adapted layer, sharing, schedules, loading."""
