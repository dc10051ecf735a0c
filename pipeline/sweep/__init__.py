"""Many runs of one configuration: what varies, who does it, and which settings can be told apart."""
