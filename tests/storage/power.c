/* What a disk has after losing power, at the worst: what was fsynced, and nothing else.
 *
 * Preloaded into a process. Each fsync or fdatasync of a file below $POWER_FROM copies its bytes to
 * $POWER_TO/bytes/INODE; each of a directory lists what is in it, NAME and INODE a line, in $POWER_TO/names: a file
 * that was made, replaced or deleted since may be as it was.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void list(const char *path, const char *to)
{
    char names[PATH_MAX];
    snprintf(names, sizeof names, "%s/names", to);
    FILE *file = fopen(names, "w");
    DIR *directory = opendir(path);
    if (!file || !directory)
        abort();
    for (struct dirent *entry; (entry = readdir(directory));)
        fprintf(file, "%s %lu\n", entry->d_name, (unsigned long)entry->d_ino);
    closedir(directory);
    fclose(file);
}

static void copy(int fd, unsigned long inode, const char *to)
{
    char bytes[PATH_MAX], part[1 << 16];
    snprintf(bytes, sizeof bytes, "%s/bytes/%lu", to, inode);
    int file = open(bytes, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    off_t at = 0;
    for (ssize_t size; (size = pread(fd, part, sizeof part, at)) > 0; at += size)
        if (write(file, part, size) != size)
            abort();
    close(file);
}

static void keep(int fd)
{
    const char *from = getenv("POWER_FROM"), *to = getenv("POWER_TO");
    char link[64], path[PATH_MAX];
    struct stat found;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0 || !from || !to || fstat(fd, &found))
        return;
    path[size] = 0;
    if (strncmp(path, from, strlen(from)))
        return;
    if (S_ISDIR(found.st_mode))
        list(path, to);
    else
        copy(fd, found.st_ino, to);
}

int fsync(int fd)
{
    int done = ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
    if (!done)
        keep(fd);
    return done;
}

int fdatasync(int fd)
{
    int done = ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd);
    if (!done)
        keep(fd);
    return done;
}
