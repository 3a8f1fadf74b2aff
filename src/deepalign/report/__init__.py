"""What is shown: tables, figures and one page, all made from a metrics dict. Computes no number; imports no torch."""
