"""Every figure of the package, by what it shows. None is made by pyplot, whose state and backend are the user's."""
