"""What texts of prompts are likely to say: a message of a few hundred bytes has too little before it to refer to.

zlib's preset dictionary for `codec.packed`: frequent English words, then what surrounds messages and tool calls (what
comes last is cheapest to refer to). Texts of other languages lose nothing. The bytes must never change: what is stored
was deflated against them, and zlib refuses to inflate it against others. Called by `codec`.
"""

WORDS = (
    b"The , and . It . A . If , but , so , which , that , or , as ; the : of the in the to the on the for "
    b"the and the by the with the from the is a of a in a as a to be it is that is there is can be has "
    b"been possible problem result program system value number example function return error message "
    b"request response available support different another following information because without between "
    b"against through during before after already never nothing something everything perhaps however "
    b"therefore although whether either neither rather several certain general common simple single "
    b"special current previous next first second third last early late recent public private local full "
    b"empty open close start stop begin run call read write list file name type text data code test check "
    b"set get put make take give keep hold store show tell ask answer mean need want use used using works "
    b"working changes changed results called given known shown made taken held kept "
    b"the of and to in a is that for it was on are as with they be at this have from or had by not but "
    b"what all were when we there can an your which their said if will each about how up out them then she "
    b"many some so these would other into has more her two like him see time could no make than first been "
    b"its who now people my made over did down only way find use may water long little very after words "
    b"called just where most know get through back much before go good new write our used me man too any "
    b"day same right look think also around another came come work three word must because does part even "
    b"place well such here take why things help put years different away again off went old number great "
    b"tell men say small every found still between name should home big give air line set own under read "
    b"last never us left end along while might next sound below saw something thought both few those "
    b"always looked show large often together asked house world going want school important until form "
    b"food keep children feet land side without boy once animals life enough took sometimes four head "
    b"above kind began almost live page got earth need far hand high year mother light parts country "
    b"father let night following picture being study second eyes soon times story boys since white days "
    b"ever paper hard near sentence better best across during today others however sure means knew it's "
    b"try told young miles sun ways thing whole hear example heard several change answer room sea against "
    b"top turned learn point city play toward five using himself usually question information following "
    b"please provide based context result user data system answer the question using only "
    b'","tool_calls":[{"id":"call_","type":"function","function":{"name":"search","arguments":"{'
    b'\\"query\\":\\"\\"}"}}]},{"tool_call_id":"call_","role":"tool","name":"","role":"system","content":[{"type":"text"'
    b',"text":"{"content":"{"role":"assistant","content":"{"role":"user","content":"'
)
