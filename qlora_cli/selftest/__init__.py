"""The promises of this tool, checked where it is used: on the user's own device, with the user's own libraries."""
