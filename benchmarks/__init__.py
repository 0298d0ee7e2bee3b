"""What is measured: scripts that time, compare and check, and store what they found."""
