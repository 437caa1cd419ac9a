"""What a report is made of: readers of artifacts, pictures, sections, the page."""
