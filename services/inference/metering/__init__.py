"""What calls used, on its way to billing. It knows no price and no engine."""
