def write_report(*a):
    print(a)
