"""The stack that people really use, and what a run needs beside the method."""
