"""What a client of Tandem needs: the generated stubs (`tandem.v1`) and a small typed client (`tandem.client`)."""
