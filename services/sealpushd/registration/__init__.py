"""Who the recipients are: subscribers, their numbers, installations, push tokens and preferences."""
