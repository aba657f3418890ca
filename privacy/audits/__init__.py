"""What attacks prove about privacy: estimators alone, without data, models or files."""
