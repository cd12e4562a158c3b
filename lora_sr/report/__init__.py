"""What networks are, cost and give: inspection, comparison, tables, curves and plots."""
