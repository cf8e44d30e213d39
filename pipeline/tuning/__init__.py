"""`eagleray tune`: measures settings of an engine on a sample of the user's rows, without Ray and without an output."""
