"""What a report is made of: pictures, and the page that shows them."""
