"""New structures for a teacher to label (Section 5 and Appendix D of the paper), one file a method.

Structures are made, relaxed by some methods, looked at by the teacher, sifted and compared; what is left goes
into an ordinary store, as structures without labels do, and the teacher's signals beside it.
"""
