"""Networks: from raw digital numbers to probabilities. Importing the package is light."""
