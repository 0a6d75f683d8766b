"""The macro view: several whole models, and a router that sends each question to one of them."""
