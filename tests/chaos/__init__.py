"""Single processes of a running suite are ended and come back, while messages travel: what that costs, and that nothing is lost."""
