# Completion of eagleray in fish. `eagleray completion fish` prints this file.
function __eagleray_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l program (string replace -r '^~' $HOME -- $words[1])
    set -e words[1]
    set -l found ($program completion --complete fish $words "$current" 2>/dev/null)
    switch "$found[1]"
        case :files :directories
            set -l key (string replace -r '^([^=]*=)?.*' '$1' -- "$current")
            set -l path (string replace -r '^[^=]*=' '' -- "$current")
            for name in (complete -C "'' $path")
                if test $found[1] = :files; or string match -qr '/(\t|$)' -- $name
                    echo $key$name
                end
            end
        case '*'
            printf '%s\n' $found
    end
end
complete -c eagleray -f -a '(__eagleray_complete)'
