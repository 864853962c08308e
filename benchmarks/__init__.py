"""Speed and memory, measured side by side; not part of the installed package. See README.md in this folder."""
